// A dense layer of integers, weights and biases in ROMs: UNITS dot products at a time, serial over the inputs.
//
// An input vector comes in CHUNKS beats of LANES activations (the last filled up with zeros), each taken when `in_valid`
// and `in_ready`. Then GROUPS results of UNITS outputs follow, each given away when `out_valid` and `out_ready`; unit u is
// in bits u*OUT .. u*OUT + OUT - 1. A vector takes CHUNKS + GROUPS * (CHUNKS + 2) cycles.
//
// An output is (sum + bias) / 2^SHIFT, rounded half to even and clipped to OUT bits, signed or unsigned.
// ACC bits must hold sum + bias, and half of 2^SHIFT more. WEIGHTS has a line for each chunk of each group, BIASES one for
// each group. The other parameters are those of `dot`.
module dense #(
    parameter W = 4,
    parameter A = 4,
    parameter A_SIGNED = 0,
    parameter MIDRISE = 0,
    parameter LANES = 16,
    parameter ACC = 20,
    parameter UNITS = 1,
    parameter CHUNKS = 1,
    parameter GROUPS = 1,
    parameter SHIFT = 0,
    parameter OUT = ACC,
    parameter OUT_SIGNED = 1,
    parameter WEIGHTS = "weights.hex",
    parameter BIASES = "biases.hex"
) (
    input clk,
    input reset,
    input in_valid,
    output in_ready,
    input [LANES*A-1:0] in_activations,
    output out_valid,
    input out_ready,
    output [UNITS*OUT-1:0] out_values
);
  localparam LOAD = 0, RUN = 1, FINISH = 2, GIVE = 3;
  reg [1:0] state;
  reg [31:0] chunk, group, word;  // word = group * CHUNKS + chunk

  reg [UNITS*LANES*W-1:0] weight_rom[0:GROUPS*CHUNKS-1];
  reg [UNITS*ACC-1:0] bias_rom[0:GROUPS-1];
  reg [LANES*A-1:0] vector[0:CHUNKS-1];
  initial begin
    $readmemh(WEIGHTS, weight_rom);
    $readmemh(BIASES, bias_rom);
  end

  assign in_ready = state == LOAD;
  assign out_valid = state == GIVE;
  wire last_chunk = chunk == CHUNKS - 1;

  // The memories answer a cycle later.
  reg [UNITS*LANES*W-1:0] weights;
  reg [UNITS*ACC-1:0] biases;
  reg [LANES*A-1:0] activations;
  reg running, first;
  always @(posedge clk) begin
    weights <= weight_rom[word];
    biases <= bias_rom[group];
    activations <= vector[chunk];
    running <= state == RUN;
    first <= state == RUN && chunk == 0;
    if (in_valid && in_ready) vector[chunk] <= in_activations;
  end

  always @(posedge clk) begin
    if (reset) begin
      state <= LOAD;
      chunk <= 0;
      group <= 0;
      word  <= 0;
    end else begin
      case (state)
        LOAD:
        if (in_valid) begin
          chunk <= last_chunk ? 0 : chunk + 1;
          if (last_chunk) state <= RUN;
        end
        RUN: begin
          chunk <= last_chunk ? 0 : chunk + 1;
          word  <= word + 1;
          if (last_chunk) state <= FINISH;
        end
        FINISH: state <= GIVE;  // with this edge the last products are in the sums
        GIVE:
        if (out_ready) begin
          if (group == GROUPS - 1) begin
            group <= 0;
            word  <= 0;
            state <= LOAD;
          end else begin
            group <= group + 1;
            state <= RUN;
          end
        end
      endcase
    end
  end

  localparam signed [ACC:0] HIGH = OUT_SIGNED ? {{(ACC - OUT + 2) {1'b0}}, {(OUT - 1) {1'b1}}}
                                              : {{(ACC - OUT + 1) {1'b0}}, {OUT{1'b1}}};
  localparam signed [ACC:0] LOW = OUT_SIGNED ? ~HIGH : 0;

  genvar u;
  generate
    for (u = 0; u < UNITS; u = u + 1) begin : unit
      wire signed [ACC-1:0] sum;
      dot #(
          .W(W),
          .A(A),
          .A_SIGNED(A_SIGNED),
          .MIDRISE(MIDRISE),
          .LANES(LANES),
          .ACC(ACC)
      ) dot (
          .clk(clk),
          .clear(first),
          .valid(running),
          .weights(weights[u*LANES*W+:LANES*W]),
          .activations(activations),
          .out_valid(),
          .acc(sum)
      );
      wire signed [ACC-1:0] total = sum + $signed(biases[u*ACC+:ACC]);
      wire signed [ACC-1:0] rounded;
      if (SHIFT == 0) begin : as_is
        assign rounded = total;
      end else begin : half_to_even
        // Half a unit less one, and that one where the quotient is odd.
        wire [ACC-1:0] half = (1 << (SHIFT - 1)) - 1 + total[SHIFT];
        wire signed [ACC-1:0] raised = total + $signed(half);
        assign rounded = raised >>> SHIFT;
      end
      wire signed [ACC:0] clipped = rounded > HIGH ? HIGH : rounded < LOW ? LOW : rounded;
      assign out_values[u*OUT+:OUT] = clipped[OUT-1:0];
    end
  endgenerate
endmodule
