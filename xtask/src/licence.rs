//! Whether a licence expression can be met with a list of licences.
//!
//! The expressions are SPDX's: names, `AND`, `OR`, `WITH`, brackets; and the older `A/B` for `OR`.

/// `Some(true)`: can be met with the licences that `allowed` says are. `None`: not an expression.
pub fn allows(expression: &str, allowed: &dyn Fn(&str) -> bool) -> Option<bool> {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = Words { words: spaced.split_whitespace().collect(), at: 0, allowed };
    let met = words.any_of()?;
    (words.at == words.words.len()).then_some(met)
}

struct Words<'a> {
    words: Vec<&'a str>,
    at: usize,
    allowed: &'a dyn Fn(&str) -> bool,
}

impl<'a> Words<'a> {
    fn next(&mut self) -> Option<&'a str> {
        let word = self.words.get(self.at).copied();
        self.at += 1;
        word
    }

    fn follows(&mut self, word: &str) -> bool {
        let follows = self.words.get(self.at) == Some(&word);
        self.at += usize::from(follows);
        follows
    }

    fn any_of(&mut self) -> Option<bool> {
        let mut met = self.all_of()?;
        while self.follows("OR") {
            met |= self.all_of()?;
        }
        Some(met)
    }

    fn all_of(&mut self) -> Option<bool> {
        let mut met = self.one()?;
        while self.follows("AND") {
            met &= self.one()?;
        }
        Some(met)
    }

    fn one(&mut self) -> Option<bool> {
        let name = match self.next()? {
            "(" => {
                let met = self.any_of()?;
                return self.follows(")").then_some(met);
            }
            "AND" | "OR" | "WITH" | ")" => return None,
            name => name,
        };
        if self.follows("WITH") {
            let exception = self.next()?;
            return Some((self.allowed)(&format!("{name} WITH {exception}")));
        }
        Some((self.allowed)(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(expression: &str) -> Option<bool> {
        allows(expression, &|name| {
            ["MIT", "Zlib", "Apache-2.0 WITH LLVM-exception"].contains(&name)
        })
    }

    #[test]
    fn expressions_are_weighed() {
        for (expression, met) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("GPL-3.0 OR MIT", true),
            ("GPL-3.0/MIT", true),
            ("GPL-3.0 AND MIT", false),
            ("(GPL-3.0 OR MIT) AND Zlib", true),
            ("GPL-3.0 OR MIT AND Zlib", true),
            ("MIT AND GPL-3.0 OR Zlib", true),
            ("Apache-2.0", false),
            ("Apache-2.0 WITH LLVM-exception", true),
            ("MIT AND (GPL-3.0 OR (Zlib))", true),
        ] {
            assert_eq!(check(expression), Some(met), "{expression}");
        }
    }

    #[test]
    fn what_is_no_expression_is_said() {
        for nonsense in ["", "MIT OR", "AND", "(MIT", "MIT)", "MIT Zlib", "MIT WITH"] {
            assert_eq!(check(nonsense), None, "{nonsense:?}");
        }
    }
}
