"""Toolkit for causal language models: what every language-model plugin would write again.

`batching` pads and buckets, `losses` computes token losses without a `[B, T, V]` tensor,
`tokenizer` trains and wraps tokenizers, `packing` makes training rows, `model` turns any
transformers model into a Tenfold model, `session` steps over its cache, `training` trains it.
Needs torch and transformers; nothing here is imported before a component is built.
"""
