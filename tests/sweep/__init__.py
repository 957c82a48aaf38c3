"""A sweep over other people's architectures, each made tiny, against a loop over single samples: `make sweep`.

`sources` lists the architectures, `shrinking` makes a configuration tiny, `inputs` and `making` find what the model can
be called with, `judging` compares the library with plain autograd, `__main__` runs one process for each architecture
and keeps the outcomes in a file, and `page` writes that file into the documentation.
"""
