"""The border between files, ModelProtos, graphs and onnxruntime sessions."""
