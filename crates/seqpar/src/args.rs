//! The tensors of a call by name, and the check that those written are apart from all others. Kernels of a cut problem see the
//! workspace only, so that their own checks know nothing of these.

use longspan_hal::{Device, Result, View, ViewMut, apart};

use crate::{Gradients, Inputs, OutputRows, Outputs};

/// Views with their names.
type Named<V> = Vec<(&'static str, V)>;

impl<'a, D: Device> Inputs<'a, D> {
    /// Checks that a forward from these into `outputs` writes neither over what it reads nor twice.
    pub(crate) fn check_forward(&self, outputs: &Outputs<'a, D>) -> Result<()> {
        let mut written = vec![("out", outputs.out), ("lse", outputs.lse)];
        if let Some([out, lse]) = outputs.joint {
            written.extend([("joint out", out), ("joint lse", lse)]);
        }
        apart(&self.named(), &written)
    }

    /// Checks that a backward from these and `rows` into `gradients` writes neither over what it reads nor twice.
    pub(crate) fn check_backward(
        &self,
        rows: &OutputRows<'a, D>,
        joint: Option<&OutputRows<'a, D>>,
        gradients: &Gradients<'a, D>,
    ) -> Result<()> {
        let mut read = self.named();
        read.extend(rows.named(["out", "lse", "dout", "dlse"]));
        read.extend(joint.into_iter().flat_map(|j| j.named(["joint out", "joint lse", "joint dout", "joint dlse"])));
        let mut written: Named<ViewMut<'a, D>> = vec![("dq", gradients.dq), ("dk", gradients.dk), ("dv", gradients.dv)];
        if let Some([q, k, v]) = gradients.joint {
            written.extend([("joint dq", q), ("joint dk", k), ("joint dv", v)]);
        }
        written.extend(gradients.dsinks.map(|d| ("dsinks", d)));
        apart(&read, &written)
    }

    fn named(&self) -> Named<View<'a, D>> {
        let mut all = vec![("q", self.q), ("k", self.k), ("v", self.v)];
        if let Some([q, k, v]) = self.joint {
            all.extend([("joint q", q), ("joint k", k), ("joint v", v)]);
        }
        all.extend(self.extras.alibi_slopes.map(|s| ("alibi_slopes", s)));
        all.extend(self.extras.sinks.map(|s| ("sinks", s)));
        all
    }
}

impl<'a, D: Device> OutputRows<'a, D> {
    fn named(&self, [out, lse, dout, dlse]: [&'static str; 4]) -> Named<View<'a, D>> {
        let mut all = vec![(out, self.out), (lse, self.lse), (dout, self.dout)];
        all.extend(self.dlse.map(|d| (dlse, d)));
        all
    }
}
