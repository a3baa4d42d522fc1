"""ONNX networks: sessions, and the table of those that can be downloaded."""
