"""The MACs in Verilog: simulated against fewbits.cost.shift_add, synthesised, and measured."""
