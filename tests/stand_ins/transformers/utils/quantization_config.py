"""The base class of quantisation settings, as a name."""


class QuantizationConfigMixin:
    pass
