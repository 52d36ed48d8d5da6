"""`generate` of transformers, accelerated: which exit policy a call gets, and when a row ends.

Nothing changes for the caller. Greedy search without processors decodes with certificates,
plain sampling samples exits; both give exactly what the full mixture gives. As soon as a
processor or warper edits scores, it must see the whole mixture, so all layers run, unless the
caller asks for a head policy (`decode_policy="sample"`): then processors edit the chosen head.
Beam search and assisted generation run at full depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from tenfold.errors import ConfigError
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, StoppingCriteriaList

from tenfold_nvium.cache import NviumCache
from tenfold_nvium.policies import AUTO, ExitPolicy, check_policy, make_policy
from tenfold_nvium.runner_cache import packed_runner

if TYPE_CHECKING:
    from tenfold_nvium.modeling import NviumForCausalLM


class WatchedStopping(StoppingCriteriaList):
    """Stopping criteria that tell a cache which rows have ended.

    `generate` goes on feeding padding into ended rows while others run; the cache then neither
    stores nor defers it.
    """

    def __init__(self, criteria: StoppingCriteriaList, cache: NviumCache) -> None:
        super().__init__(criteria)
        self._cache = cache

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`[B]` boolean: rows that end now."""
        done = super().__call__(input_ids, scores, **kwargs)
        self._cache.end_rows(done.cpu().numpy())
        return done


class RoutedGenerationMixin(GenerationMixin):
    """`GenerationMixin` whose sampling loop decodes with deferral where that is exact, or where
    the caller asks for it."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling (`_sample` of transformers), with the policy resolved.

        Raises:
            ConfigError: a policy together with something it cannot work with.
        """
        asked = model_kwargs.pop("decode_policy", None)
        policy = self._policy(
            asked, bool(generation_config.do_sample), bool(logits_processor), synced_gpus
        )
        cache = model_kwargs.get("past_key_values")
        if generation_config.output_attentions:
            raise ConfigError("output_attentions: N-vium's layers do not return attention maps")
        if generation_config.output_hidden_states:
            policy = None  # all layers of every token: the ordinary cache does it
            if asked is not None or isinstance(cache, NviumCache):
                raise ConfigError(
                    "output_hidden_states needs every layer of every token; leave decode_policy "
                    "and the NviumCache out"
                )
        elif not synced_gpus:
            cache = self._own_cache(cache, asked)
        if isinstance(cache, NviumCache):
            model_kwargs |= {"past_key_values": cache, "decode_policy": policy}
            cache.start_rows()
            cache.exit_history = []
            if any(hasattr(c, "eos_token_id") for c in stopping_criteria):
                stopping_criteria = WatchedStopping(stopping_criteria, cache)
        parent: Any = super()
        try:
            if isinstance(cache, NviumCache) and self._packs():
                cache.runner = packed_runner(cast("NviumForCausalLM", self))
            return parent._sample(
                input_ids, logits_processor, stopping_criteria, generation_config,
                synced_gpus=synced_gpus, streamer=streamer, **model_kwargs,
            )  # fmt: skip
        finally:
            if isinstance(cache, NviumCache):
                cache.runner = None
                cache.start_rows()

    def _assisted_decoding(self, *arguments: Any, **keywords: Any) -> Any:
        """Assisted generation (`_assisted_decoding` of transformers), at full depth.

        Raises:
            ConfigError: the cache holds tokens already; transformers 5.23 then writes another
                text than without assistance, for its own models too.
        """
        cache = keywords.get("past_key_values")
        if isinstance(cache, Cache) and cache.get_seq_length():
            raise ConfigError(
                "assisted generation cannot continue a cache: transformers takes the wrong "
                "positions from it",
                hint="leave past_key_values out, or continue without assistance",
            )
        parent: Any = super()
        return parent._assisted_decoding(*arguments, **keywords)

    def _packs(self) -> bool:
        """Whether to decode from packed copies of the weights: not in a training loop, whose
        weights change after every call, nor under autocast, which casts them itself."""
        model: Any = self
        autocast = torch.is_autocast_enabled(model.device.type)
        return bool(model.config.packed_decoding) and not model.training and not autocast

    def _policy(
        self, asked: Any, samples: bool, edits_scores: bool, synced: bool
    ) -> ExitPolicy | None:
        """The policy of a call; None runs all layers."""
        config: Any = getattr(self, "config")  # noqa: B009
        wanted = asked if asked is not None else config.decode_policy
        if wanted != AUTO:
            if synced and asked is not None:
                raise ConfigError(
                    "routed decoding under sharded weights (ZeRO-3, FSDP) would wait forever: "
                    "processes leave at different exits, but weights are gathered together",
                    hint='gather the weights first, or generate with decode_policy="full"',
                )
            policy = make_policy(wanted)
            check_policy(policy, config.num_exits)
            if policy.certifies and (samples or edits_scores):
                raise ConfigError(
                    "certified decoding proves the mixture's arg-max; it goes with greedy search "
                    "without processors",
                    hint='use decode_policy="sample", or leave it out',
                )
            return None if synced else policy
        if edits_scores or synced or config.num_exits == 1:
            return None
        return make_policy("sample" if samples else "certified")

    def _own_cache(self, cache: Cache | None, asked: Any) -> Cache | None:
        """The cache to decode with: the caller's own, or a new one in place of the empty cache
        that `generate` has prepared; None without any (`use_cache=False`)."""
        if isinstance(cache, NviumCache):
            return cache
        empty = isinstance(cache, DynamicCache) and cache.get_seq_length() == 0
        if empty and not getattr(cache, "_is_user_defined", False):
            return NviumCache(getattr(self, "config"))  # noqa: B009
        if asked is not None:
            raise ConfigError(
                "decode_policy defers tokens, which needs an NviumCache; leave past_key_values "
                "out or pass an NviumCache, and keep use_cache on"
            )
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ConfigError(
                f"a {type(cache).__name__} cannot hold N-vium's deferred tokens",
                hint="leave cache_implementation out, or pass a DynamicCache for full depth",
            )
        return cache
