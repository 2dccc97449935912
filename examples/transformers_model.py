# SPDX-License-Identifier: Apache-2.0
"""Text by a transformers model whose weights are mostly in RAM or on disk.

python examples/transformers_model.py MODEL PROMPT [SPEC]

MODEL is a folder or an id of the hub, such as Qwen/Qwen3-8B; SPEC is a placement, such as
"cuda:0,6gb;cpu,*". Without one, free memory decides.
"""

import sys

from transformers import AutoTokenizer

import distorch
from distorch.integrations import load_pretrained

if len(sys.argv) < 3:
    sys.exit(__doc__)
name, prompt, *spec = sys.argv[1:]
model = load_pretrained(name, *spec)
tokenizer = AutoTokenizer.from_pretrained(name)
tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=32)[0], skip_special_tokens=True))
print(distorch.report(model))
