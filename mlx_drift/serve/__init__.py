"""Serving: conversations that take turns on one device, a store of their caches, HTTP on top.

One thread owns the device (`engine`). The engine knows nothing of HTTP; the dialects of the APIs
(`api`) know nothing of the device. `http` puts one on top of the other.
"""
