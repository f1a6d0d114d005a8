// Swap adapters in C++, on a decoder's bundle of `loradeploy export --required-inputs`, in fp32.
//
//     swap_adapters BUNDLE COUNT TOKEN,TOKEN,…
//
// Generates COUNT tokens greedily with the base and with every adapter. First each adapter alone, in
// ONNX Runtime's own format; then all in one batch, one per row, with side inputs that are stacked
// manually. Prints a line of JSON for each.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

namespace fs = std::filesystem;
using Shape = std::vector<int64_t>;
using Tokens = std::vector<int64_t>;

template <class T>
Ort::Value tensor(const std::vector<T>& values, const Shape& shape) {
  Ort::AllocatorWithDefaultOptions allocator;
  auto result = Ort::Value::CreateTensor<T>(allocator, shape.data(), shape.size());
  std::copy(values.begin(), values.end(), result.template GetTensorMutableData<T>());
  return result;
}

struct Feeds {
  std::vector<std::string> names;
  std::vector<Ort::Value> values;

  void give(const std::string& name, Ort::Value value) {
    const size_t index = std::find(names.begin(), names.end(), name) - names.begin();
    if (index == names.size()) {
      names.push_back(name);
      values.push_back(std::move(value));
    } else {
      values[index] = std::move(value);
    }
  }
};

std::vector<const char*> pointers(const std::vector<std::string>& names) {
  std::vector<const char*> result;
  for (const std::string& name : names) result.push_back(name.c_str());
  return result;
}

// -- manual side inputs -------------------------------------------------------------------------

struct Array {
  Shape shape;  // [1, size] or [1, rows, columns]
  std::vector<float> values;
};
using Arrays = std::map<std::string, Array>;

// Reads a safetensors file: the length of the header in 8 bytes, the header as JSON, then the data.
// Supports headers as `loradeploy` writes them. int64 entries (slots and branches) are skipped;
// `mixed` sets them.
Arrays side_inputs(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  uint64_t length = 0;
  stream.read(reinterpret_cast<char*>(&length), sizeof length);
  std::string header(length, ' ');
  stream.read(header.data(), static_cast<std::streamsize>(length));
  if (!stream) throw std::runtime_error(file.string() + " is missing or broken");
  static const std::regex entry(
      R"re("([^"]+)":\{"dtype":"F32","shape":\[([0-9,]*)\],"data_offsets":\[(\d+),(\d+)\]\})re");
  Arrays arrays;
  for (std::sregex_iterator found(header.begin(), header.end(), entry), end; found != end; ++found) {
    Array& array = arrays[(*found)[1]];
    std::istringstream sizes((*found)[2]);
    for (std::string size; std::getline(sizes, size, ',');) array.shape.push_back(std::stoll(size));
    const auto begin = std::stoull((*found)[3]), past = std::stoull((*found)[4]);
    array.values.resize((past - begin) / sizeof(float));
    stream.seekg(static_cast<std::streamoff>(8 + length + begin));
    stream.read(reinterpret_cast<char*>(array.values.data()),
                static_cast<std::streamsize>(past - begin));
  }
  return arrays;
}

// Stacks the rows' arrays of one side input, padded with zeros to the largest rank.
Ort::Value stacked(const std::string& name, const std::vector<Arrays>& rows) {
  Shape shape = rows[0].at(name).shape;
  for (const Arrays& row : rows)
    for (size_t axis = 0; axis < shape.size(); ++axis)
      shape[axis] = std::max(shape[axis], row.at(name).shape[axis]);
  shape[0] = static_cast<int64_t>(rows.size());
  const size_t height = shape[1], width = shape.size() == 3 ? shape[2] : 1;
  std::vector<float> values(rows.size() * height * width, 0);
  for (size_t slot = 0; slot < rows.size(); ++slot) {
    const Array& array = rows[slot].at(name);
    const size_t own_height = array.shape[1], own_width = shape.size() == 3 ? array.shape[2] : 1;
    for (size_t y = 0; y < own_height; ++y)
      std::copy_n(array.values.begin() + y * own_width, own_width,
                  values.begin() + (slot * height + y) * width);
  }
  return tensor(values, shape);
}

// The side inputs of a batch in which row i has its own adapter. `adapter_ids` is the slot of each row,
// and `adapter_mode` selects the branch with adapters, if the bundle has these inputs. `logits_to_keep`
// keeps its default, logits at every position.
Feeds mixed(const Ort::Session& session, const std::vector<Arrays>& rows) {
  Feeds feeds;
  for (const std::string& name : session.GetOverridableInitializerNames()) {
    if (name == "logits_to_keep" || name.rfind("inputs_embeds", 0) == 0 || name == "mrope_position_ids") continue;
    if (name == "adapter_mode") {
      feeds.give(name, tensor<int64_t>({1}, {1}));
    } else if (name == "adapter_ids") {
      Tokens ids(rows.size());
      for (size_t row = 0; row < ids.size(); ++row) ids[row] = static_cast<int64_t>(row);
      feeds.give(name, tensor(ids, {static_cast<int64_t>(ids.size())}));
    } else {
      feeds.give(name, stacked(name, rows));
    }
  }
  return feeds;
}

// -- generation ---------------------------------------------------------------------------------

// Generates `count` tokens after `prompt` in each of `rows` rows; `feeds` are additional inputs.
std::vector<Tokens> generate(Ort::Session& session, const Tokens& prompt, int64_t rows,
                             size_t count, Feeds feeds, const Ort::RunOptions& options) {
  const std::vector<std::string> outputs = session.GetOutputNames();
  const std::vector<std::string> taken = session.GetInputNames();
  for (size_t index = 0; index < taken.size(); ++index) {
    if (taken[index].rfind("past_key_values.", 0) != 0) continue;
    Shape shape = session.GetInputTypeInfo(index).GetTensorTypeAndShapeInfo().GetShape();
    feeds.give(taken[index], tensor<float>({}, {rows, shape[1], 0, shape[3]}));
  }
  std::vector<Tokens> generated(rows), news(rows, prompt);
  int64_t seen = 0;
  while (generated[0].size() < count) {
    const auto length = static_cast<int64_t>(news[0].size());
    Tokens ids, positions;
    for (const auto& row : news) {
      ids.insert(ids.end(), row.begin(), row.end());
      for (int64_t position = 0; position < length; ++position) positions.push_back(seen + position);
    }
    seen += length;
    feeds.give("input_ids", tensor(ids, {rows, length}));
    if (std::find(taken.begin(), taken.end(), "position_ids") != taken.end())
      feeds.give("position_ids", tensor(positions, {rows, length}));
    feeds.give("attention_mask", tensor(Tokens(rows * seen, 1), {rows, seen}));

    auto results = session.Run(options, pointers(feeds.names).data(), feeds.values.data(),
                               feeds.values.size(), pointers(outputs).data(), outputs.size());
    for (size_t index = 0; index < outputs.size(); ++index) {
      if (outputs[index].rfind("present.", 0) == 0) {
        feeds.give("past_key_values." + outputs[index].substr(8), std::move(results[index]));
      } else if (outputs[index] == "logits") {
        const auto vocabulary = results[index].GetTensorTypeAndShapeInfo().GetShape()[2];
        const float* logits = results[index].GetTensorData<float>();  // [rows, length, vocabulary]
        for (int64_t row = 0; row < rows; ++row) {
          const float* last = logits + ((row + 1) * length - 1) * vocabulary;
          news[row] = {std::max_element(last, last + vocabulary) - last};
          generated[row].push_back(news[row][0]);
        }
      }
    }
  }
  return generated;
}

void print(const char* how, const std::string& name, const Tokens& tokens) {
  std::cout << "{\"how\": \"" << how << "\", \"name\": \"" << name << "\", \"tokens\": [";
  for (size_t index = 0; index < tokens.size(); ++index)
    std::cout << (index ? ", " : "") << tokens[index];
  std::cout << "]}" << std::endl;
}

int main(int count, char** words) try {
  const fs::path bundle = count == 4 ? words[1] : "";
  const std::regex number("[0-9]{1,9}"), numbers("[0-9]{1,9}(,[0-9]{1,9})*");
  if (count != 4 || !fs::exists(bundle / "required.safetensors") ||
      !std::regex_match(words[2], number) || !std::regex_match(words[3], numbers)) {
    std::cerr << "give a bundle of `loradeploy export --required-inputs`, a number of tokens,"
                 " and tokens as 5,6,7\n";
    return 2;
  }
  const size_t tokens = std::stoul(words[2]);
  Tokens prompt;
  std::istringstream given(words[3]);
  for (std::string token; std::getline(given, token, ',');) prompt.push_back(std::stoll(token));

  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "swap_adapters");
  Ort::SessionOptions session_options;
  session_options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);  // hides a warning per side input
  Ort::Session session(env, (bundle / "model.onnx").c_str(), session_options);

  std::vector<fs::path> adapters;
  for (const auto& entry : fs::directory_iterator(bundle / "adapters"))
    if (entry.path().extension() == ".onnx_adapter") adapters.push_back(entry.path());
  std::sort(adapters.begin(), adapters.end());

  print("adapter", "base", generate(session, prompt, 1, tokens, {}, Ort::RunOptions())[0]);
  for (const fs::path& file : adapters) {
    auto adapter = Ort::LoraAdapter::CreateLoraAdapter(file, nullptr);
    Ort::RunOptions options;
    options.AddActiveLoraAdapter(adapter);
    print("adapter", file.stem().string(), generate(session, prompt, 1, tokens, {}, options)[0]);
  }

  std::vector<Arrays> rows = {side_inputs(bundle / "required.safetensors")};
  for (fs::path file : adapters) rows.push_back(side_inputs(file.replace_extension(".safetensors")));
  const auto all = generate(session, prompt, static_cast<int64_t>(rows.size()), tokens,
                            mixed(session, rows), Ort::RunOptions());
  for (size_t row = 0; row < rows.size(); ++row)
    print("row", row ? adapters[row - 1].stem().string() : "base", all[row]);
  return 0;
} catch (const std::exception& problem) {
  std::cerr << problem.what() << "\n";
  return 1;
}
