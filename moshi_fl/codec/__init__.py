"""Delta codecs: what a contribution's tensors look like on the wire.

Each codec stores one entry per tensor, under the tensor's own name, whose dtype and shape follow
from the tensor's shape alone. So a file can be checked against the base before it is decoded.
"""
