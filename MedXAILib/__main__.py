"""`python -m MedXAILib` is the program `medxai`, for where only the interpreter's path is known."""

from MedXAILib.cli import app

if __name__ == "__main__":
    app(prog_name="medxai")
