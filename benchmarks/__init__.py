"""MedXAI beside its peers: the same map, its time and its memory. See README.md."""
