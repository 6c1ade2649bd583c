`timescale 1ns / 1ps
// Serial multiply-accumulate by shifting and adding: acc <= (clear ? 0 : acc) + a * w in max(1, popcount(w)) cycles.
//
// Each cycle takes the lowest set bit of the weight that is left, adds the activation shifted to it (subtracts it at the
// sign bit, 2 * width + 1) and clears it. ready: the operands on the ports are taken at the next edge, since this cycle
// is the last one of those held. start takes them in any case: after power-up. Weights have 2, 4, 6 or 8 bits (width 0 .. 3); bits of w above them must be 0.
//
// SHIFTER 0: one-hot select, an AND-OR of all shifts. SHIFTER 1: three stages of multiplexers.
// WIDTHS 1: the width is an input, for layers of mixed bits. WIDTHS 0: it is fixed, at N bits.
module shift_add_mac #(
    parameter N = 8,
    parameter ACC = 32,
    parameter SHIFTER = 1,
    parameter WIDTHS = 1
) (
    input                clk,
    input                start,
    input                clear,
    input      [    1:0] width,
    input      [    7:0] a,
    input      [  N-1:0] w,
    output               ready,
    output reg [ACC-1:0] acc
);
    localparam SPAN = N + 7;  // bits of a shifted activation
    reg [7:0] a_held;
    reg [N-1:0] left;
    reg clear_held;

    wire [N-1:0] below;  // whether a lower bit is set
    genvar k;
    generate
        assign below[0] = 1'b0;
        for (k = 1; k < N; k = k + 1) begin : lower
            assign below[k] = below[k-1] | left[k-1];
        end
    endgenerate
    wire [N-1:0] lowest = left & ~below;
    wire [N-1:0] rest = left & below;
    assign ready = ~|rest;
    wire take = ready | start;

    wire [N-1:0] sign_bit;
    generate
        for (k = 0; k < N; k = k + 1) begin : signs
            if (WIDTHS) begin : any
                if (k % 2) assign sign_bit[k] = width == k / 2;
                else assign sign_bit[k] = 1'b0;
            end else begin : fixed
                assign sign_bit[k] = k == N - 1;
            end
        end
    endgenerate
    wire subtract = |(lowest & sign_bit);

    // a << k, or its complement with ones below it, to which the carry in adds the one that is missing.
    wire [SPAN-1:0] term;
    generate
        if (SHIFTER == 0) begin : one_hot
            wire [7:0] fed = a_held ^ {8{subtract}};
            wire [SPAN-1:0] row[0:N];
            assign row[0] = {SPAN{1'b0}};
            for (k = 0; k < N; k = k + 1) begin : select
                wire [SPAN+8:0] shifted = ({{SPAN + 1{fed[7]}}, fed} << k) | ((1 << k) - 1) * subtract;
                assign row[k+1] = row[k] | (shifted[SPAN-1:0] & {SPAN{lowest[k]}});
            end
            assign term = row[N];
        end else begin : stages
            // a weight of zero adds zero
            wire [7:0] fed = (a_held ^ {8{subtract}}) & {8{|left}};
            wire [2:0] place;
            wire [7:0] padded = lowest;
            assign place = {|padded[7:4], padded[7] | padded[6] | padded[3] | padded[2],
                            padded[7] | padded[5] | padded[3] | padded[1]};
            wire [8:0] by_1 = place[0] ? {fed, subtract} : {fed[7], fed};
            wire [10:0] by_2 = place[1] ? {by_1, {2{subtract}}} : {{2{by_1[8]}}, by_1};
            wire [14:0] by_4 = place[2] ? {by_2, {4{subtract}}} : {{4{by_2[10]}}, by_2};
            assign term = by_4[SPAN-1:0];
        end
    endgenerate

    wire [ACC-1:0] from = clear_held ? {ACC{1'b0}} : acc;
    wire [ACC-1:0] next;
    ripple_adder #(.WIDTH(ACC)) add (
        .a(from), .b({{ACC - SPAN{term[SPAN-1]}}, term}), .carry_in(subtract), .sum(next)
    );

    always @(posedge clk) begin
        acc <= next;
        clear_held <= take & clear;
        left <= take ? w : rest;
        if (take) a_held <= a;
    end
endmodule
