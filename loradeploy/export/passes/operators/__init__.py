"""Make nodes calls of functions, which the operators' library can replace by its kernels.

Each function has the name of an operator, in the domain loradeploy, and its body are the standard
nodes that it stands for: onnxruntime inlines it. If a session registers the library, onnxruntime
runs the library's kernel instead. These are the last passes of an export, because no other pass
knows the calls; every other change of a bundle's graph undoes them first.
"""
