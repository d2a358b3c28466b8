"""What the MedXAI module of 3D Slicer is made of."""
