"""The kernel library of speed-engine: fused diffusion-training ops on torch alone.

Every op is a folder: `op.py` (the torch.library op: shapes, dtypes, fake, autograd), `reference.py` (plain torch,
obviously right), `triton_gpu.py` (CUDA) and `cpp_cpu.py` (C++ on the CPU). What several ops share lies beside the
folders, and no op imports another. Importing this package builds and registers nothing; importing an op's `op.py`
registers that op.
"""
