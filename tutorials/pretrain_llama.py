"""Pre-train the small Llama that the text tutorials adapt: over bytes, on the standard library's own source.

Writes the folder ``checkpoints/llama_source``, which transformers' ``from_pretrained`` loads. The same seed gives the
same bytes on the same machine under the same Python.
"""

import argparse
from pathlib import Path

import lightning as L

from lightning_peft.recipes import CausalLM, SourceCodeData

FOLDER = Path(__file__).parent / "checkpoints" / "llama_source"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    # bytes only: no token begins or ends a text
    "bos_token_id": None,
    "eos_token_id": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-bytes", type=int, default=3_000_000)
    args = parser.parse_args()

    L.seed_everything(args.seed)
    module = CausalLM(config=CONFIG, lr=3e-3)
    data = SourceCodeData(seq_len=128, batch_size=32, max_bytes=args.max_bytes)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    loss = trainer.test(module, data, verbose=False)[0]["test_loss"]
    module.model.save_pretrained(FOLDER)
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    print(f"{FOLDER.name}: {size / 2**20:.2f} MB, {loss / 0.6931:.2f} bits per byte of unseen source")


if __name__ == "__main__":
    main()
