"""The values that RunParams fields may take, apart from numbers: what the help of the options needs
without loading RunParams."""

MODEL_SIZES = ("nano", "tiny", "small", "base", "large")
DEVICES = ("cuda", "cpu")
INT8_MODES = ("w8a8", "w8")
COMPILE_MODES = (
    "default",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
    "off",
)
ATTENTION_BACKENDS = ("flash", "cudnn", "efficient", "math", "auto")
INT8_BACKENDS = ("torchao", "fused", "auto")
FEEDS = ("device", "host")
