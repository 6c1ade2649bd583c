// Feeds products from a file and writes what each did: "acc cycles", acc as it is after the product, in hex.
//
// Defines: SERIAL for shift_add_mac (else int8_mac), BITS of the weight port, WIDTH of its weights (serial), VECTORS
// (lines "clear a w", hex), RESULTS, PARAMETERS of the circuit (none for a netlist). DUMP: a VCD of the nets of the circuit, for energy.
`timescale 1ns / 1ps
`ifndef PARAMETERS
`define PARAMETERS
`endif
module mac_tb;
    reg clk = 0, start = 1, clear;
    reg [7:0] a;
    reg [`BITS-1:0] w;
    wire [31:0] acc;
    wire ready;
    integer vectors, results, got, cycles, pending;

`ifdef SERIAL
    wire [1:0] width = `WIDTH;
    shift_add_mac `PARAMETERS dut (
        .clk(clk), .start(start), .clear(clear), .width(width), .a(a), .w(w), .ready(ready), .acc(acc)
    );
`else
    assign ready = 1'b1;
    int8_mac `PARAMETERS dut (.clk(clk), .clear(clear), .a(a), .w(w), .acc(acc));
`endif

    always #50 clk = ~clk;

    // Operands change and results are read at the falling edge, half a cycle after all registers.
    initial begin
        vectors = $fopen(`VECTORS, "r");
        results = $fopen(`RESULTS, "w");
        got = $fscanf(vectors, "%h %h %h\n", clear, a, w);
        @(negedge clk) start = 0;  // the first product is held now
`ifdef DUMP
        $dumpfile(`DUMP);
        $dumpvars(1, dut);
`endif
        pending = 1;
        while (pending) begin
            got = $fscanf(vectors, "%h %h %h\n", clear, a, w);
            pending = got == 3;
            for (cycles = 1; ready !== 1'b1 && cycles < 9; cycles = cycles + 1) @(negedge clk);
            @(negedge clk) $fwrite(results, "%h %0d\n", acc, cycles);
        end
        $finish;
    end
endmodule
