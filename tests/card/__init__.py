"""What only an NVIDIA card can answer, as one script: `python -m tests.card PART [PART...] --out DIR --model FOLDER --arc FILE`.

Each part runs in a process of its own on the card that CUDA_VISIBLE_DEVICES names, keeps what it found in DIR/PART.json while it
works, and goes on where it was killed. `compare` reads kept ledgers again, `table` prints the rows for docs/MEASURED.md.
"""
