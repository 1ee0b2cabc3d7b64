// What differs between two texts, in words: Chinese characters, Latin words and numbers, spaces, single signs.

const WORDS = /\p{Script=Han}|[[\p{L}\p{M}\p{N}'’\-]--\p{Script=Han}]+|\s+|./gsv;

/**
 * @returns {{kind: "same" | "changed", was: string, now: string}[]} in order; all `was` together are the first text, all `now` the second
 */
export function compare(before, after) {
  const was = before.match(WORDS) ?? [];
  const now = after.match(WORDS) ?? [];
  const common = tableOfCommon(was, now);
  const parts = [];
  const add = (kind, oldWord, newWord) => {
    if (parts.at(-1)?.kind !== kind) parts.push({ kind, was: "", now: "" });
    parts.at(-1).was += oldWord;
    parts.at(-1).now += newWord;
  };
  let [i, j] = [0, 0];
  while (i < was.length || j < now.length) {
    if (i < was.length && j < now.length && was[i] === now[j]) add("same", was[i++], now[j++]);
    else if (j === now.length || (i < was.length && common[i + 1][j] >= common[i][j + 1])) add("changed", was[i++], "");
    else add("changed", "", now[j++]);
  }
  return parts;
}

/** common[i][j]: the most words that was[i..] and now[j..] share in order. */
function tableOfCommon(was, now) {
  const common = Array.from({ length: was.length + 1 }, () => new Uint16Array(now.length + 1));
  for (let i = was.length - 1; i >= 0; i--) {
    for (let j = now.length - 1; j >= 0; j--) {
      common[i][j] = was[i] === now[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  return common;
}
