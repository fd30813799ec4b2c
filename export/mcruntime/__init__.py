"""mcruntime: what leaves the building. Loads a bundle, runs it, serves it; never imports torch, timm or mcdeploy."""
