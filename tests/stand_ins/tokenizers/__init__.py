"""A name that diffusers imports."""


class Tokenizer:
    pass
