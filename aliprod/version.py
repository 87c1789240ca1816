"""The version, in a module: where a folder named aliprod lies in the working folder, Python takes that for the package
and finds the modules of this one all the same, but not what stands in its __init__."""

VERSION = "0.1.0"
