/**
 * Seals everything in the database anew with the present key, so that the one
 * before can be thrown away. Bears being cut off and run again, beside working
 * replicas: each row is replaced only if it is still what was read.
 */
import { findCluster, replaceSealedSecrets } from "../db/cluster.ts";
import type { Queryable } from "../db/database.ts";
import { replaceSealedAnswer, sealedAnswers } from "../db/idempotency.ts";
import type { Sealer } from "../model/sealer.ts";

const PAGE = 500;

/** Throws when something was sealed with a key that `sealer` does not have; nothing else is lost by that. */
export async function reseal(
  db: Queryable,
  sealer: Sealer,
  reach: (name: string) => void | Promise<void> = () => undefined,
): Promise<{ answers: number }> {
  const cluster = await findCluster(db);
  if (cluster) {
    const plain = sealer.open("cluster-secrets", cluster.sealedSecrets);
    const sealed = sealer.seal("cluster-secrets", plain);
    await reach("reseal.cluster.before");
    if (!(await replaceSealedSecrets(db, cluster.sealedSecrets, sealed))) {
      throw new Error("the cluster's secrets were sealed by somebody else just now: run it again");
    }
    await reach("reseal.cluster.after");
  }
  let answers = 0;
  for (let after = { teamId: "", key: "" }; ;) {
    const page = await sealedAnswers(db, { after, limit: PAGE });
    for (const answer of page) {
      const plain = sealer.open("idempotent-answer", answer.sealedBody);
      const sealed = sealer.seal("idempotent-answer", plain);
      await reach("reseal.answer.before");
      if (await replaceSealedAnswer(db, answer, sealed)) answers += 1;
      await reach("reseal.answer.after");
    }
    const last = page.at(-1);
    if (!last || page.length < PAGE) return { answers };
    after = last;
  }
}
