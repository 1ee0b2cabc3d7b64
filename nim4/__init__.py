"""NIM4-ASR: streaming, LLM-based speech recognition for Mandarin, English and their mixture (arXiv 2604.18105)."""

__version__ = "0.1.0"
