// A dot product of integers: LANES products a clock cycle, summed up over as many cycles as it takes.
//
// Activations have A bits: unsigned, or two's complement with A_SIGNED = 1.
// Weights have W bits. With MIDRISE = 0 they are two's complement, with MIDRISE = 1 codes c = 0 .. 2^W - 1 of the odd
// integers 2 c - (2^W - 1). One bit stands for -1 (0) or +1 (1) with either.
// Lane i is in bits i*W .. i*W + W - 1 of `weights`, and in the same place of `activations`.
//
// `valid`: add the products of this cycle. `clear`: forget what was summed before this cycle; with `valid` too, begin
// anew with these products. `acc` is the sum so far, a cycle later, when `out_valid` follows `valid`. ACC bits need only
// hold the last sum: what overflows on the way to it comes back.
(* use_dsp = "no" *)
module dot #(
    parameter W = 4,
    parameter A = 4,
    parameter A_SIGNED = 0,
    parameter MIDRISE = 0,
    parameter LANES = 16,
    parameter ACC = 20
) (
    input clk,
    input clear,
    input valid,
    input [LANES*W-1:0] weights,
    input [LANES*A-1:0] activations,
    output reg out_valid,
    output reg signed [ACC-1:0] acc
);
  localparam P = W + A + 1;  // bits of a product
  wire [LANES*P-1:0] products;

  genvar i;
  generate
    for (i = 0; i < LANES; i = i + 1) begin : lane
      wire [W-1:0] code = weights[i*W+:W];
      wire [A-1:0] bits = activations[i*A+:A];
      wire signed [A:0] a = {A_SIGNED ? bits[A-1] : 1'b0, bits};
      wire signed [P-1:0] product;
      if (W == 1) begin : sign
        assign product = code ? a : -a;
      end else if (MIDRISE) begin : odd
        // 2 c - (2^W - 1) = 2 (c - 2^(W-1)) + 1: c with its highest bit inverted, and a 1 below. A constant bit costs
        // a multiplier next to nothing; codes times activations would need a second sum, that of the activations.
        wire signed [W:0] w = {~code[W-1], code[W-2:0], 1'b1};
        assign product = w * a;
      end else begin : twos_complement
        wire signed [W-1:0] w = code;
        assign product = w * a;
      end
      assign products[i*P+:P] = product;
    end
  endgenerate

  reg signed [ACC-1:0] sum;
  integer k;
  always @* begin
    sum = 0;
    for (k = 0; k < LANES; k = k + 1) sum = sum + $signed(products[k*P+:P]);
  end

  always @(posedge clk) begin
    out_valid <= valid;
    if (clear || valid) acc <= (clear ? 0 : acc) + (valid ? sum : 0);
  end
endmodule
