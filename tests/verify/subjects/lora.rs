//! LoRA on a linear map in Rust, as a shared library with C's calling convention. No mask, no bias.
//! y = x W' + s x A' B';  gx = gy W + s gy B A,  gA = s B' gy' x,  gB = s gy' z.
#![crate_type = "cdylib"]
use std::slice::{from_raw_parts as read, from_raw_parts_mut as write};

/// out += f * a b', with a : (n, k) and b : (m, k), both row-major.
fn add_nt(out: &mut [f64], a: &[f64], b: &[f64], n: usize, m: usize, k: usize, f: f64) {
    for i in 0..n {
        for j in 0..m {
            out[i * m + j] += f * (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum::<f64>();
        }
    }
}

/// The transpose of a : (n, m).
fn transposed(a: &[f64], n: usize, m: usize) -> Vec<f64> {
    (0..n * m).map(|i| a[(i % n) * m + i / n]).collect()
}

#[no_mangle]
pub unsafe extern "C" fn lora_fwd(
    n: i64, d_in: i64, d_out: i64, r: i64, s: f64,
    x: *const f64, w: *const f64, a: *const f64, b: *const f64, y: *mut f64, z: *mut f64,
) {
    let (n, d_in, d_out, r) = (n as usize, d_in as usize, d_out as usize, r as usize);
    let (x, w) = (read(x, n * d_in), read(w, d_out * d_in));
    let (a, b) = (read(a, r * d_in), read(b, d_out * r));
    let (y, z) = (write(y, n * d_out), write(z, n * r));
    y.fill(0.0);
    z.fill(0.0);
    add_nt(z, x, a, n, r, d_in, 1.0);
    add_nt(y, x, w, n, d_out, d_in, 1.0);
    add_nt(y, z, b, n, d_out, r, s);
}

#[no_mangle]
pub unsafe extern "C" fn lora_bwd(
    n: i64, d_in: i64, d_out: i64, r: i64, s: f64,
    x: *const f64, w: *const f64, a: *const f64, b: *const f64, z: *const f64, gy: *const f64,
    gx: *mut f64, ga: *mut f64, gb: *mut f64,
) {
    let (n, d_in, d_out, r) = (n as usize, d_in as usize, d_out as usize, r as usize);
    let (x, w) = (read(x, n * d_in), read(w, d_out * d_in));
    let (a, b) = (read(a, r * d_in), read(b, d_out * r));
    let (z, gy) = (read(z, n * r), read(gy, n * d_out));
    let (gx, ga, gb) = (write(gx, n * d_in), write(ga, r * d_in), write(gb, d_out * r));
    let mut gz = vec![0.0; n * r];
    add_nt(&mut gz, gy, &transposed(b, d_out, r), n, r, d_out, s);
    for out in [&mut *gx, &mut *ga, &mut *gb] {
        out.fill(0.0);
    }
    add_nt(gx, gy, &transposed(w, d_out, d_in), n, d_in, d_out, 1.0);
    add_nt(gx, &gz, &transposed(a, r, d_in), n, d_in, r, 1.0);
    add_nt(ga, &transposed(&gz, n, r), &transposed(x, n, d_in), r, d_in, n, 1.0);
    add_nt(gb, &transposed(gy, n, d_out), &transposed(z, n, r), d_out, r, n, s);
}
