"""Run benchmarks and write what they find: `python -m benchmarks [NAME ...] [--quick]`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time

from benchmarks import places, results, tables

BENCHMARKS = {
    "convert_gguf": "Hugging Face folder to GGUF: wall and peak memory",
    "convert_7b": "a 7B-shaped model to GGUF: peak memory against the plan's word",
    "merge_7b": "a LoRA merged into a 7B-shaped model: wall and peak memory against PEFT",
    "export_onnx": "Hugging Face folder to ONNX int4: wall and peak memory",
    "decode_onnx": "prefill and decode of equal int4 graphs",
    "best_int4": "our best int4 recipe against the peer's default build: decode and KL",
    "llamacpp_loop": "prefill and decode through our llama.cpp runtime",
    "onnx_llamacpp": "prefill, decode and KL of our ONNX artifacts against llama.cpp's files",
    "runtime_loops": "prefill and decode through genai, MLX and torch",
    "families": "what a conversion costs by family, per byte, against Llama's",
    "adapters": "what rounding leaves of a fine-tune, and rsLoRA by llama.cpp's own way",
    "quality": "answers of calibrated GGUF files in llama.cpp against its importance matrix",
    "k_quants": "answers of each k-quant alone, on the matrices that divide, against the same",
    "fit": "answers at the size of Q4_K_M: grids chosen by tensor against llama.cpp's mixture",
    "tune": "what --tune adds to each type, in at most half an hour",
    "quantize": "GPTQ of SmolLM2: wall, peak memory and KL against gptqmodel",
    "int4": "int4 of four kinds: KL against gptqmodel, llm-compressor and auto-round",
    "memory": "GPTQ of 1B- and 3B-shaped models: peak memory against the plan's word",
    "drafting": "decoding with prompt lookup, where the answer repeats the text",
    "prefix": "time to the first token behind a text that was computed before",
    "kv_cache": "KL of keys and values in fewer bits, by runtime",
    "profiler": "what `edgellm profile` says against bare loops and llama-bench's definition",
    "cold_start": "time to help and to the first token",
}


def main() -> int:
    """Run what was asked for, all of it by default; the exit code is 1 when a target was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure edgellm and its peers, interleaved, each command in its own process.",
        epilog="\n".join(f"  {name:14} {what}" for name, what in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all, in this order")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one repetition: shows that everything runs; results go to the work folder",
    )
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}")
    load = os.getloadavg()[0]
    if load > 0.3 and not arguments.quick:
        print(f"warning: the machine is busy (load {load:.2f}); results say so", file=sys.stderr)
    folder = places.WORK / "results-quick" if arguments.quick else places.RESULTS
    missed = 0
    for name in arguments.names or BENCHMARKS:
        print(f"== {name}: {BENCHMARKS[name]}", file=sys.stderr)
        started = time.perf_counter()
        result = importlib.import_module(f"benchmarks.{name}").measure(quick=arguments.quick)
        results.save(result, folder / f"{name}.json")
        print(tables.render(results.load(folder / f"{name}.json")))
        print(f"   {time.perf_counter() - started:.0f} s", file=sys.stderr)
        missed += sum(comparison.met is False for comparison in result.comparisons)
    if not arguments.quick:
        tables.update()
    if missed:
        print(f"{missed} target(s) missed", file=sys.stderr)
    return 1 if missed and not arguments.quick else 0


if __name__ == "__main__":
    raise SystemExit(main())
