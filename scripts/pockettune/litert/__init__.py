"""LiteRT's files (.tflite, .litertlm): making, quantizing, reading and bundling them."""
