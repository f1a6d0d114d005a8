// Swap adapters in C#, on a decoder's bundle of `loradeploy export --required-inputs`, in fp32.
//
//     dotnet run -- BUNDLE COUNT TOKEN,TOKEN,…
//
// Generates COUNT tokens greedily with the base and with every adapter. First each adapter alone, in
// ONNX Runtime's own format; then all in one batch, one per row, with side inputs that are stacked
// manually. Prints a line of JSON for each.
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;
using System.Text.Json;
using System.Text.RegularExpressions;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

static class Program
{
    class Array
    {
        public long[] Shape;  // [1, size] or [1, rows, columns]
        public float[] Values;
    }

    // Reads a safetensors file: the length of the header in 8 bytes, the header as JSON, then the data.
    // int64 entries (slots and branches) are skipped; Mixed sets them.
    static Dictionary<string, Array> SideInputs(string file)
    {
        byte[] bytes = File.ReadAllBytes(file);
        int length = (int)BitConverter.ToInt64(bytes, 0);
        var arrays = new Dictionary<string, Array>();
        using (JsonDocument header = JsonDocument.Parse(bytes.AsMemory(8, length)))
        {
            foreach (JsonProperty entry in header.RootElement.EnumerateObject())
            {
                if (entry.Name == "__metadata__" || entry.Value.GetProperty("dtype").GetString() != "F32")
                    continue;
                long[] shape = Numbers(entry.Value.GetProperty("shape"));
                long[] offsets = Numbers(entry.Value.GetProperty("data_offsets"));
                var part = bytes.AsSpan(8 + length + (int)offsets[0], (int)(offsets[1] - offsets[0]));
                float[] values = MemoryMarshal.Cast<byte, float>(part).ToArray();
                arrays[entry.Name] = new Array { Shape = shape, Values = values };
            }
        }
        return arrays;
    }

    static long[] Numbers(JsonElement list)
    {
        return list.EnumerateArray().Select(number => number.GetInt64()).ToArray();
    }

    // Stacks the rows' arrays of one side input, padded with zeros to the largest rank.
    static OrtValue Stacked(Array[] rows)
    {
        long[] shape = rows[0].Shape.Select((_, axis) => rows.Max(row => row.Shape[axis])).ToArray();
        shape[0] = rows.Length;
        long height = shape[1], width = shape.Length == 3 ? shape[2] : 1;
        var values = new float[rows.Length * height * width];
        for (long slot = 0; slot < rows.Length; ++slot)
        {
            long own = shape.Length == 3 ? rows[slot].Shape[2] : 1;
            for (long y = 0; y < rows[slot].Shape[1]; ++y)
                System.Array.Copy(rows[slot].Values, y * own, values, (slot * height + y) * width, own);
        }
        return OrtValue.CreateTensorValueFromMemory(values, shape);
    }

    // The side inputs of a batch in which row i has its own adapter. `adapter_ids` is the slot of each
    // row, and `adapter_mode` selects the branch with adapters, if the bundle has these inputs.
    // `logits_to_keep` keeps its default, logits at every position.
    static Dictionary<string, OrtValue> Mixed(InferenceSession session, Dictionary<string, Array>[] rows)
    {
        var feeds = new Dictionary<string, OrtValue>();
        foreach (string name in session.OverridableInitializerMetadata.Keys)
        {
            if (name == "logits_to_keep" || name.StartsWith("inputs_embeds") || name == "mrope_position_ids") continue;
            if (name == "adapter_mode")
                feeds[name] = Int64(new long[] { 1 }, 1);
            else if (name == "adapter_ids")
                feeds[name] = Int64(rows.Select((_, row) => (long)row).ToArray(), rows.Length);
            else
                feeds[name] = Stacked(rows.Select(row => row[name]).ToArray());
        }
        return feeds;
    }

    static OrtValue Int64(long[] values, params long[] shape)
    {
        return OrtValue.CreateTensorValueFromMemory(values, shape);
    }

    // Generates `count` tokens after `prompt` in each of `rows` rows; `feeds` are additional inputs.
    static List<long>[] Generate(
        InferenceSession session, long[] prompt, int rows, int count, Dictionary<string, OrtValue> feeds,
        RunOptions options)
    {
        foreach (var input in session.InputMetadata)
        {
            if (!input.Key.StartsWith("past_key_values.")) continue;
            int[] size = input.Value.Dimensions;
            feeds[input.Key] = OrtValue.CreateAllocatedTensorValue(
                OrtAllocator.DefaultInstance, TensorElementType.Float, new long[] { rows, size[1], 0, size[3] });
        }
        var generated = Enumerable.Range(0, rows).Select(_ => new List<long>()).ToArray();
        long[][] news = Enumerable.Repeat(prompt, rows).ToArray();
        int seen = 0;
        while (generated[0].Count < count)
        {
            int length = news[0].Length;
            var positions = Enumerable.Range(seen, length).Select(position => (long)position);
            feeds["input_ids"] = Int64(news.SelectMany(row => row).ToArray(), rows, length);
            if (session.InputMetadata.ContainsKey("position_ids"))
                feeds["position_ids"] = Int64(news.SelectMany(_ => positions).ToArray(), rows, length);
            seen += length;
            feeds["attention_mask"] = Int64(Enumerable.Repeat(1L, rows * seen).ToArray(), rows, seen);

            var results = session.Run(options, feeds, session.OutputNames);
            for (int index = 0; index < results.Count; ++index)
            {
                string name = session.OutputNames[index];
                OrtValue value = results[index];
                if (name.StartsWith("present."))
                {
                    string past = name.Replace("present.", "past_key_values.");
                    feeds[past].Dispose();
                    feeds[past] = value;
                }
                else if (name == "logits")
                {
                    int vocabulary = (int)value.GetTensorTypeAndShape().Shape[2];
                    var logits = value.GetTensorDataAsSpan<float>();  // [rows, length, vocabulary]
                    for (int row = 0; row < rows; ++row)
                    {
                        var last = logits.Slice(((row + 1) * length - 1) * vocabulary, vocabulary).ToArray();
                        news[row] = new long[] { System.Array.IndexOf(last, last.Max()) };
                        generated[row].Add(news[row][0]);
                    }
                }
            }
        }
        return generated;
    }

    static void Print(string how, string name, List<long> tokens)
    {
        Console.WriteLine(
            $"{{\"how\": \"{how}\", \"name\": \"{name}\", \"tokens\": [{string.Join(", ", tokens)}]}}");
    }

    static int Main(string[] words)
    {
        if (words.Length != 3 || !File.Exists(Path.Combine(words[0], "required.safetensors"))
            || !Regex.IsMatch(words[1], "^[0-9]{1,9}$") || !Regex.IsMatch(words[2], "^[0-9]{1,9}(,[0-9]{1,9})*$"))
        {
            Console.Error.WriteLine("give a bundle of `loradeploy export --required-inputs`, a number of"
                + " tokens, and tokens as 5,6,7");
            return 2;
        }
        string bundle = words[0];
        int count = int.Parse(words[1]);
        long[] prompt = words[2].Split(',').Select(long.Parse).ToArray();

        var quiet = new SessionOptions { LogSeverityLevel = OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR };
        string[] adapters = Directory.GetFiles(Path.Combine(bundle, "adapters"), "*.onnx_adapter")
            .OrderBy(file => file, StringComparer.Ordinal).ToArray();
        using (var session = new InferenceSession(Path.Combine(bundle, "model.onnx"), quiet))
        {
            using (var options = new RunOptions())
            {
                var feeds = new Dictionary<string, OrtValue>();
                Print("adapter", "base", Generate(session, prompt, 1, count, feeds, options)[0]);
            }
            foreach (string file in adapters)
            {
                using (var adapter = OrtLoraAdapter.Create(file, null))
                using (var options = new RunOptions())
                {
                    options.AddActiveLoraAdapter(adapter);
                    var feeds = new Dictionary<string, OrtValue>();
                    var tokens = Generate(session, prompt, 1, count, feeds, options)[0];
                    Print("adapter", Path.GetFileNameWithoutExtension(file), tokens);
                }
            }

            var rows = adapters.Select(file => SideInputs(Path.ChangeExtension(file, "safetensors"))).ToList();
            rows.Insert(0, SideInputs(Path.Combine(bundle, "required.safetensors")));
            using (var options = new RunOptions())
            {
                var mixed = Mixed(session, rows.ToArray());
                var all = Generate(session, prompt, rows.Count, count, mixed, options);
                for (int row = 0; row < all.Length; ++row)
                    Print("row", row == 0 ? "base" : Path.GetFileNameWithoutExtension(adapters[row - 1]), all[row]);
            }
        }
        return 0;
    }
}
