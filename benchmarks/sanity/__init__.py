"""Do maps show where the nodule is, and do they depend on what the network learnt? `python -m benchmarks.sanity`."""
