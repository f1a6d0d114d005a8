"""An adapter as data: configuration, tensors, scaling, digest. numpy and safetensors only."""
