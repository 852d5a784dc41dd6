"""SAE files of other libraries, one file per format: each reads into demur's modules, and writes where it can.

`detect` tells which format a folder or file is. To add one: a module with NAME and `read(place, input_scale)`, a row in
`detect.FORMATS`, and a fixture written by the library itself under tests/fixtures/saes.
"""
