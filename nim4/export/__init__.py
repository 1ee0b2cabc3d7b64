"""Models for other runtimes: ONNX Runtime and sherpa-onnx. See docs/export.md."""
