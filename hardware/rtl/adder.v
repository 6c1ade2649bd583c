`timescale 1ns / 1ps
// A full adder, kept as a cell of its own so that synthesis can give it the library's full adder, and a ripple of them.
(* keep_hierarchy *)
module full_adder (
    input  a,
    input  b,
    input  c,
    output sum,
    output carry
);
    assign sum = a ^ b ^ c;
    assign carry = (a & b) | (c & (a ^ b));
endmodule

module ripple_adder #(
    parameter WIDTH = 32
) (
    input  [WIDTH-1:0] a,
    input  [WIDTH-1:0] b,
    input              carry_in,
    output [WIDTH-1:0] sum
);
    wire [WIDTH:0] carry;
    assign carry[0] = carry_in;
    genvar i;
    generate
        for (i = 0; i < WIDTH; i = i + 1) begin : column
            full_adder add (.a(a[i]), .b(b[i]), .c(carry[i]), .sum(sum[i]), .carry(carry[i+1]));
        end
    endgenerate
endmodule
