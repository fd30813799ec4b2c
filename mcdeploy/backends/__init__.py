"""What a compiled model becomes, one engine a file; each is loaded behind the ``Runner`` of ``mcruntime.engine``."""
