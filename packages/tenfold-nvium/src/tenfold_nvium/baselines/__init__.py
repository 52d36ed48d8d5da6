"""Early-exit baselines that an N-vium is compared with: CALM and LayerSkip.

Both are real models (trained, saved, loaded by AutoModel) on the same backbone, and both are
decoded on the same packed layers, cache and blocks as an N-vium, so that a difference in speed
comes from the method and not from its loop. CALM changes the text (it is approximate below a
threshold of 1); LayerSkip's self-speculation does not.

The models register themselves with transformers when `tenfold_nvium.baselines.modeling` is
imported.
"""
