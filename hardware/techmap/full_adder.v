// Maps full_adder to the library's full adder, or to gates where an input is constant.
(* techmap_celltype = "full_adder" *)
module map_full_adder (
    input  a,
    input  b,
    input  c,
    output sum,
    output carry
);
    parameter _TECHMAP_CONSTMSK_a_ = 0;
    parameter _TECHMAP_CONSTMSK_b_ = 0;
    parameter _TECHMAP_CONSTMSK_c_ = 0;
    generate
        if (_TECHMAP_CONSTMSK_a_ || _TECHMAP_CONSTMSK_b_ || _TECHMAP_CONSTMSK_c_) begin : gates
            assign sum = a ^ b ^ c;
            assign carry = (a & b) | (c & (a | b));
        end else begin : cell
            FAX1 add (.A(a), .B(b), .C(c), .YS(sum), .YC(carry));
        end
    endgenerate
endmodule
