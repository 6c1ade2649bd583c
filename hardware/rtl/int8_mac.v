`timescale 1ns / 1ps
// Parallel multiply-accumulate: acc <= (clear ? 0 : acc) + a * w, one product a cycle, signed operands.
//
// A Baugh-Wooley array whose carry-save rows start from the accumulator, so that one adder of ACC - W columns ends both
// the product and the sum. With A-bit a and W-bit w, the products with one sign bit are inverted and the constant
// 2^(A-1) + 2^(W-1) - 2^(A+W-1) is added; for A = W that is 2^W - 2^(2W-1).
//
// ARRAY 0: leaves multiplication and addition to the synthesiser instead.
module int8_mac #(
    parameter W = 8,  // bits of both operands
    parameter ACC = 32,
    parameter ARRAY = 1
) (
    input                clk,
    input                clear,
    input      [  W-1:0] a,
    input      [  W-1:0] w,
    output reg [ACC-1:0] acc
);
    reg [W-1:0] a_held, w_held;
    reg clear_held;
    wire [ACC-1:0] from = clear_held ? {ACC{1'b0}} : acc;
    wire [ACC-1:0] next;

    generate
        if (ARRAY) begin : array
            carry_save_array #(.W(W), .ACC(ACC)) all (.from(from), .a(a_held), .w(w_held), .next(next));
        end else begin : plain
            assign next = $signed(from) + $signed(a_held) * $signed(w_held);
        end
    endgenerate

    always @(posedge clk) begin
        a_held <= a;
        w_held <= w;
        clear_held <= clear;
        acc <= next;
    end
endmodule

module carry_save_array #(
    parameter W = 8,
    parameter ACC = 32
) (
    input  [ACC-1:0] from,
    input  [  W-1:0] a,
    input  [  W-1:0] w,
    output [ACC-1:0] next
);
    wire [ACC-1:0] s[0:W];  // carry-save rows: sums
    wire [2*W-1:0] c[0:W];  // and carries
    assign s[0] = from;
    assign c[0] = {2 * W{1'b0}};
    genvar i, j;
    generate
        for (j = 0; j < W; j = j + 1) begin : row
            for (i = 0; i < ACC; i = i + 1) begin : column
                if (i >= j && i < j + W) begin : adds
                    wire product = (a[i-j] & w[j]) ^ ((i - j == W - 1) != (j == W - 1));
                    full_adder add (
                        .a(s[j][i]), .b(product), .c(c[j][i]), .sum(s[j+1][i]), .carry(c[j+1][i+1])
                    );
                end else begin : passes
                    assign s[j+1][i] = s[j][i];
                end
            end
            assign c[j+1][j:0] = {j + 1{1'b0}};
            if (j < W - 1) begin : above
                assign c[j+1][2*W-1:j+W+1] = {W - 1 - j{1'b0}};
            end
        end
    endgenerate
    // The last carries have weights W .. 2W - 1. The constant's 2^W is the carry in, and 2^(2W-1) less is the top
    // carry inverted and extended.
    assign next[W-1:0] = s[W][W-1:0];
    ripple_adder #(.WIDTH(ACC - W)) last (
        .a(s[W][ACC-1:W]),
        .b({{ACC - 2 * W + 1{~c[W][2*W-1]}}, c[W][2*W-2:W]}),
        .carry_in(1'b1),
        .sum(next[ACC-1:W])
    );
endmodule
