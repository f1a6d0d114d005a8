"""A client program that uses only onnxruntime-genai and nothing of this project.

python genai_client.py BUNDLE ADAPTER COUNT TOKEN…    prints the base's and the adapter's tokens
"""

import json
import sys

import onnxruntime_genai as og

bundle, adapter, count, *prompt = sys.argv[1:]
model = og.Model(bundle)
adapters = og.Adapters(model)
adapters.load(adapter, "mine")


def generate(active):
    parameters = og.GeneratorParams(model)
    length = len(prompt) + int(count)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    if active:
        generator.set_active_adapter(adapters, "mine")
    generator.append_tokens([int(token) for token in prompt])
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


print(json.dumps({"base": generate(False), "adapter": generate(True)}))
