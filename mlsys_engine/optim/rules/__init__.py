"""The rules, one file each, more for those of several parts: a class, its hyper-parameters and its checks."""
