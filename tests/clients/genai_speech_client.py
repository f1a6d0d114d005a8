"""A client program that transcribes speech with onnxruntime-genai and nothing of this project.

python genai_speech_client.py BUNDLE AUDIO LENGTH PROMPT [ADAPTER]    prints the generated tokens

AUDIO is a WAV file, or features in a .npy file. PROMPT is a text of the initial tokens. LENGTH is
the maximum number of tokens, with the initial ones.
"""

import json
import sys

import numpy as np
import onnxruntime_genai as og

bundle, audio, length, prompt, *adapter = sys.argv[1:]
model = og.Model(bundle)
tokens = og.Tokenizer(model).encode(prompt)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=int(length), do_sample=False)
generator = og.Generator(model, parameters)
adapters = og.Adapters(model)
if adapter:
    adapters.load(adapter[0], "mine")
    generator.set_active_adapter(adapters, "mine")
if audio.endswith(".wav"):
    processor = model.create_multimodal_processor()
    generator.set_inputs(processor([prompt], audios=og.Audios.open(audio)))
else:
    inputs = og.NamedTensors()
    inputs["input_features"] = np.load(audio)
    generator.set_inputs(inputs)
    generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)][len(tokens) :]))
