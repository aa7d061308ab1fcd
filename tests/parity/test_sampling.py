"""Sampling filters against transformers' own logits processors."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm.sampling import Sampler, SamplingOptions

torch = pytest.importorskip("torch", reason="torch is not installed")
processors = pytest.importorskip(
    "transformers.generation.logits_process", reason="transformers is not installed"
)

VOCAB = 3000
RECENT = [5, 17, 17, 2999, 0, 250]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=0.7),
        SamplingOptions(temperature=1.3, top_k=40),
        SamplingOptions(temperature=1.0, top_p=0.9),
        SamplingOptions(temperature=2.5, top_p=0.98),
        SamplingOptions(temperature=0.8, min_p=0.05),
        SamplingOptions(temperature=0.9, top_k=50, top_p=0.8, min_p=0.02),
        SamplingOptions(temperature=1.0, repeat_penalty=1.3, repeat_window=None),
        SamplingOptions(
            temperature=0.6, top_k=100, top_p=0.95, repeat_penalty=1.1, repeat_window=None
        ),
    ],
    ids=lambda options: str(options).removeprefix("SamplingOptions"),
)
def test_distribution_equals_transformers(options: SamplingOptions, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 3
    chain = processors.LogitsProcessorList()
    if options.repeat_penalty != 1:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(options.repeat_penalty))
    chain.append(processors.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        chain.append(processors.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chain.append(processors.TopPLogitsWarper(options.top_p))
    if options.min_p:
        chain.append(processors.MinPLogitsWarper(options.min_p))
    # In float64, so that what is compared is the order of the filters and not their rounding.
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    wanted = torch.softmax(chain(torch.tensor([RECENT]), scores), -1)[0].numpy()

    ids, probabilities = Sampler(options).candidates(logits, RECENT)
    found = np.zeros(VOCAB)
    found[ids] = probabilities
    assert set(np.flatnonzero(found)) == set(np.flatnonzero(wanted))
    # The repeat penalty is applied in float32 here: 1e-6 of a logit, by the temperature.
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
