"""ComfyUI's inside, known in this folder alone.

A source is read (source.py, features.py) and applied (applied.py) by patches on a MODEL (patch.py), which work in each
call of its UNet (call.py; caa.py has CAA's part of a block; unet.py says what a UNet is). model.py and nets.py make
MODELs and a VAE of TruePose files, vision.py opens image encoders and CAA adapters, files.py finds files, guider.py
samples, view.py looks at attention. cfld.py, control3d.py, field.py and references.py are patches of their own;
body.py stops a graph's branch; checks.py says what a model lacks; benchmark/ measures.
"""
