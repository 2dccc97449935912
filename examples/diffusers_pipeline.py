# SPDX-License-Identifier: Apache-2.0
"""A picture by a diffusers pipeline whose weights are mostly in RAM or on disk.

python examples/diffusers_pipeline.py MODEL PROMPT [SPEC]

MODEL is a folder or an id of the hub, such as black-forest-labs/FLUX.1-dev; SPEC is one budget for
all parts, such as "cuda:0,6gb;cpu,*". Without one, free memory decides. The picture is out.png.
"""

import sys

from distorch.integrations import load_pipeline, pipeline_report

if len(sys.argv) < 3:
    sys.exit(__doc__)
model, prompt, *spec = sys.argv[1:]
pipe = load_pipeline(model, *spec)
pipe(prompt).images[0].save("out.png")
print(pipeline_report(pipe))
