"""One checked call: what every backend is given.

options.py    Options: the numbers of a call, validated once and interned by value
checks.py     checks of tensors and head maps, with the errors that users see
attention.py  AttentionCall: attention over dense tensors, a cache or packed sequences
append.py     AppendCall: new tokens for a cache
"""
