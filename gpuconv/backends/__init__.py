"""The implementations: one algorithm, one file. ``gpuconv.dispatch.TABLE`` lists them."""
