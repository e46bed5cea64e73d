"""What the commands do, as functions over paths and text; the command line itself is `onnxq.cli`."""
