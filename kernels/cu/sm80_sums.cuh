// The order of dq's f32 sums with LINES, in which a warp adds to whole lines of memory straight from its registers.
//
// A product leaves 8 rows x 16 columns with 4 elements a lane: lane 4 r + q has columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9 of
// row r. These 128 elements are neighbours in memory, lane after lane, ADD_WIDTH elements of each at a time. So the memory of 8
// rows of a head has columns 0..16 first, then 16..32, and so on. Rows count from the tensor's first one, wherever a tile or a
// piece begins, so all that add to the sums agree; their number is a multiple of 8. The sums lack the scale.

// Where element e of a lane is, from the first of the 8 rows on. DIM: columns of a row, 64, 128 or 256.
template <int DIM, typename T> DEVICE T sum_offset(T stride, int column16, int lane, int e) {
    const int unit = column16 * 128 + e / ADD_WIDTH * (ADD_WIDTH * WARP);
    const int at = lane * ADD_WIDTH + e % ADD_WIDTH;
    return (unit / DIM + at / DIM) * stride + (unit % DIM + at % DIM);
}
